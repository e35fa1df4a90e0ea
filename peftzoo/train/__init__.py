"""One trainer: recipes, data, the loop and what it leaves behind; looks methods up by name and imports none."""
