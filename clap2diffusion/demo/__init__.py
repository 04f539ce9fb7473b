"""The page to play with: sounds in a browser, pictures beside them, all on this machine."""
