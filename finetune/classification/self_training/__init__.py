"""Fine-tuning with unlabeled images: a teacher, the moving average of the student, labels them for the student.

The method is that of Semi-ViT (arXiv 2208.05688) after a supervised first part, with FixMatch's weak and strong views
(2001.07685), FreeMatch's thresholds (2205.07246) and ReMixMatch's distribution alignment (1911.09785).
"""
