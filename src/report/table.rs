//! Tables as the templates write them.

use serde::Serialize;

/// A table whose rows begin with a label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Table {
    /// The heads of all columns, that of the labels included.
    pub columns: Vec<Column>,
    /// The rows.
    pub rows: Vec<TableRow>,
}

/// The head of a column.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Column {
    /// What the column is about.
    pub name: String,
    /// Whether its cells are text, which begins at the left, and not numbers.
    pub is_text: bool,
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
        let column = |name: &str| Column { name: name.to_string(), is_text: false };
        Table { columns: columns.into_iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row. A column whose cells are text has its head at the left too.
    pub fn push(&mut self, label: impl Into<String>, cells: Vec<Cell>) {
        for (column, cell) in self.columns.iter_mut().skip(1).zip(&cells) {
            column.is_text |= cell.class == "text";
        }
        self.rows.push(TableRow { label: label.into(), cells });
    }

    /// Adds a row of plain cells.
    pub fn row(&mut self, label: impl Into<String>, cells: impl IntoIterator<Item = String>) {
        self.push(label, cells.into_iter().map(|text| Cell { text, class: "" }).collect());
    }
}
