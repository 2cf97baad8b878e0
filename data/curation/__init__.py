"""MetaCLIP's curation of image-caption pairs: match captions against metadata, then balance the matches."""
