"""Classification with unlabeled images: `simmim.finetune.self_training`, with a label for each image."""
