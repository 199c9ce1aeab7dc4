"""Random changes of labeled images, done by the batch on its device."""
