"""Where the embedded speech comes from: registry packages to a manifest of clips."""
