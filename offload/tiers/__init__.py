"""Where bytes live: device slots, the host arena and the files of the store."""
