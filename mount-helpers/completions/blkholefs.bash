# bash completion of blkholefs(8)
