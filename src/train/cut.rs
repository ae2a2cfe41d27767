//! How the values of a tensor are cut among ranks.

use std::ops::Range;

use crate::device::GroupPlace;
use crate::optimizer::BLOCK;

/// A tensor of `len` values among ranks. Each rank has a piece of as many whole blocks as all ranks can have; what is left over,
/// fewer than a block for each rank, is the last rank's too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    len: usize,
    place: GroupPlace,
}

impl Cut {
    /// The cut of a tensor of `len` values, as the rank at `place` sees it.
    pub fn new(len: usize, place: GroupPlace) -> Self {
        Cut { len, place }
    }

    fn piece(&self) -> usize {
        self.len / self.place.ranks / BLOCK * BLOCK
    }

    /// The values that are cut into equal pieces, one for each rank.
    pub fn body(&self) -> Range<usize> {
        0..self.piece() * self.place.ranks
    }

    /// The values after [`Cut::body`], which the last rank has.
    pub fn tail(&self) -> Range<usize> {
        self.body().end..self.len
    }

    /// The rank that has [`Cut::tail`].
    pub fn last_rank(&self) -> usize {
        self.place.ranks - 1
    }

    /// The values of this rank; empty where the tensor is too small for a block for each.
    pub fn own(&self) -> Range<usize> {
        let start = self.place.rank * self.piece();
        match self.place.rank == self.last_rank() {
            true => start..self.len,
            false => start..start + self.piece(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_all_ranks_follow_each_other_and_begin_at_blocks() {
        for ranks in 1..=5 {
            for len in [0, 1, 255, 256, 1000, 1024, 4096 + 17, 100_000] {
                let mut end = 0;
                for rank in 0..ranks {
                    let cut = Cut::new(len, GroupPlace { rank, ranks });
                    let own = cut.own();
                    assert_eq!((own.start, own.start % BLOCK), (end, 0), "{len} values, {ranks} ranks");
                    assert!(
                        cut.body().len().is_multiple_of(ranks) && cut.tail().len() < ranks * BLOCK.max(1)
                    );
                    end = own.end;
                }
                assert_eq!(end, len);
            }
        }
    }
}
