"""flash-mini: a small SD3.5-Flash, trained and distilled here, as the built-in checkpoint of export-flash."""
