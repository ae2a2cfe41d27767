//! Tables as the templates write them.

use serde::Serialize;

/// A table whose rows begin with a label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Table {
    /// The heads of all columns, that of the labels included.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<TableRow>,
}

/// A row: a label and as many cells as there are further columns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TableRow {
    /// What the row is about.
    pub label: String,
    /// Its values.
    pub cells: Vec<Cell>,
}

/// A value, and how it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// The value.
    pub text: String,
    /// `good`, `bad`, `text`, or nothing: a class of style.css.
    pub class: &'static str,
}

impl Table {
    /// A table without rows.
    pub fn new<'a>(columns: impl IntoIterator<Item = &'a str>) -> Self {
        Table { columns: columns.into_iter().map(str::to_string).collect(), rows: Vec::new() }
    }

    /// Adds a row of plain cells.
    pub fn row(&mut self, label: impl Into<String>, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|text| Cell { text, class: "" }).collect();
        self.rows.push(TableRow { label: label.into(), cells });
    }
}
