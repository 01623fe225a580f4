"""Lightning callbacks that prune, watch and export."""
