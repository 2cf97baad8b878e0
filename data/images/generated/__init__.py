"""Generated pictures and clips whose content is known."""
