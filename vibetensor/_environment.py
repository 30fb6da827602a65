"""Environment variables that switch something on or off."""

import os


def env_flag(name: str, otherwise: bool) -> bool:
    """Whether the variable is on; `otherwise` where it is unset or empty. 0, off, no and false,
    however written, are off; anything else is on. As `env_flag` of csrc/core/environment.h."""
    text = os.environ.get(name, "")
    return text.lower() not in ("0", "off", "no", "false") if text else otherwise
