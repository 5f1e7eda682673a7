"""The world of emoji: glyphs of three sets on lit backgrounds, their captions and their judge."""
