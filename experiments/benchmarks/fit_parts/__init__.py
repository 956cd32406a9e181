"""What fit.py, stage1.py and large_images.py share."""
