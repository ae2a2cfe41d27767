//! The library's C interface where the program's own calls never lead.
