"""Official data files: found in a folder or on the hub, read row by row, checked."""
