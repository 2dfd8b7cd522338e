"""The Python API behind `import ll3m`: models, data and training for notebooks and programs."""
