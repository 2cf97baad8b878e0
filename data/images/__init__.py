"""Pictures and videos: documents of parts, decoding, tiles, and generated scenes."""
