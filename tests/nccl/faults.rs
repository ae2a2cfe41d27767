//! Ranks that disagree, abort, die or never come.
