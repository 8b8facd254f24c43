"""The stories, one file each: ``pyrosc.models.scvi`` is the file, ``pyrosc.scvi`` builds the Program."""
