"""The stories, one file each: ``pyrosc.models.scvi`` is the file, ``pyrosc.scvi`` builds the Program.

story   assumes                                                        use it for
scvi    a low-dimensional state, decoded to shares of genes; NB counts  most count data with batches
"""
