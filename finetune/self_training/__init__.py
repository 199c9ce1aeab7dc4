"""Fine-tuning with unlabeled images, of any task: a teacher, the moving average of the student, labels them for the student.

The method is that of Semi-ViT (arXiv 2208.05688) after a supervised first part, with FixMatch's weak and strong views
(2001.07685); `pseudo_labels.py` names the sources of alignment and thresholds. What a task adds is in its own folder
`self_training/`: views, settings of its own, and the step.
"""
