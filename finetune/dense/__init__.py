"""What tasks share whose labels are places in images: views at a scale, windows, head files, pictures, whole images."""
