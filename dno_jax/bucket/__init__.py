"""Run directories in an object store: worked on in a folder of this machine, and mirrored to the bucket.

An object store has no appending, no renaming and no locking, and half of what a run writes needs them. So a run works
in a local folder as ever, and the bucket gets whole files, in such an order that it never shows a finished stage whose
files are not all there:

    place    which URLs there are, and where their local folder is
    store    objects read and written through fsspec, tried again, errors explained
    lock     the object that says who works on a path
    local    what lies in the folder, and what of it is known to lie in the bucket
    mirror   from the bucket to the folder and back
"""
