"""Pictures to what the vision encoder reads, as Llama 4's processor does it, by Pillow and numpy alone.

`canvas` chooses the grid of tiles and the placeholder tokens, `decode` reads encoded bytes, `tiles` cuts a picture.
"""
