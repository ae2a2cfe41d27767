//! The documentation as a book: its commands run, its links lead somewhere, its reference of options is the table's, and
//! the examples of jobs do what their pages say. `tools/book.sh` builds and checks the pages themselves.

mod commands;
mod jobs;
mod options;
mod pages;
mod workplace;
