"""From one device to N ranks: the layout, its meshes and one file per technique, applied from outside the model."""
