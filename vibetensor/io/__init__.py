"""Files: Safetensors (`vibetensor.io.safetensors`) and writes that cannot harm what was there."""
