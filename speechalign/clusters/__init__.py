"""Files that describe clusters and applications, looked at before anything is started."""
