"""ViT's rows in the tables of foreign formats, one file per format."""
