"""Pages and screens made from run folders: `rlinf report`, `rlinf watch`."""
