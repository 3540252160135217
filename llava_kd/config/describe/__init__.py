"""What the settings say of themselves, for people and for editors, from any section that is handed in."""
