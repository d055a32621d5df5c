"""What a person or a program touches: the page, the routes and the terminal's tables."""
