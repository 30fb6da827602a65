"""Models in plain torch style, short enough to read at one sitting: `minigpt`, `vit`, `reverse`."""
