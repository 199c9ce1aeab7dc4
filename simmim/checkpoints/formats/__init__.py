"""File formats: one object per format (`base.Format`), found by name or by what a file holds (`registry`)."""
