"""Look for the questions of examinations in the text that a model was trained on."""
