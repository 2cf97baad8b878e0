"""Pictures and videos: decoding, tiles, and generated scenes."""
