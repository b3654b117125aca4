# fish completion of blkholefs(8)
