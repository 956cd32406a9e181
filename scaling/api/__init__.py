"""What `import scaling` offers: read a library, render its scenes, fit new ones."""
