//! Tables with aligned columns.

use std::io::{self, Write};

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

const GAP: usize = 3;

/// On which side of its column a cell stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Align {
    /// Text.
    #[default]
    Left,
    /// Numbers and sizes.
    Right,
}

/// Rows below titles. Columns are as wide as their widest cell, as a terminal counts it; nothing is wrapped, and
/// no line ends in spaces. Control characters in cells are shown escaped, so that a name cannot move the cursor.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with left-aligned columns.
    pub(crate) fn new<S: Into<String>>(titles: impl IntoIterator<Item = S>) -> Self {
        Self {
            columns: titles.into_iter().map(|title| (title.into(), Align::Left)).collect(),
            rows: Vec::new(),
        }
    }

    /// Aligns the column with this title to the right.
    #[must_use]
    pub(crate) fn right(mut self, title: &str) -> Self {
        for (name, align) in &mut self.columns {
            if name == title {
                *align = Align::Right;
            }
        }
        self
    }

    /// Adds a row; missing cells are empty.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell.into())).collect());
    }

    /// Writes titles and rows.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|index| {
                let cells = self.rows.iter().filter_map(|row| row.get(index)).map(|cell| cell.width());
                cells.chain([self.columns[index].0.width()]).max().unwrap_or(0)
            })
            .collect();
        let titles: Vec<String> = self.columns.iter().map(|(title, _)| title.clone()).collect();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for (index, (_, align)) in self.columns.iter().enumerate() {
                let cell = row.get(index).map_or("", String::as_str);
                let padding = " ".repeat(widths[index].saturating_sub(cell.width()));
                match align {
                    Align::Left => line.extend([cell, &padding]),
                    Align::Right => line.extend([&padding, cell]),
                }
                line.push_str(&" ".repeat(GAP));
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

fn printable(cell: &str) -> String {
    if cell.chars().any(char::is_control) {
        cell.chars()
            .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
            .collect()
    } else {
        cell.to_owned()
    }
}

/// At most `columns` wide, with an ellipsis where something was cut off.
pub(crate) fn clip(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let mut out = String::new();
    let mut used = 0;
    for c in text.chars() {
        let width = c.width().unwrap_or(0);
        if used + width + 1 > columns {
            break;
        }
        used += width;
        out.push(c);
    }
    out.push('…');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(table: &Table) -> String {
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(["NAME", "SIZE"]).right("SIZE");
        table.row(["日本", "5 B"]);
        table.row(["longer name", "1023 B"]);
        assert_eq!(shown(&table), "NAME            SIZE\n日本             5 B\nlonger name   1023 B\n");
    }

    #[test]
    fn no_line_ends_in_spaces_and_no_cell_moves_the_cursor() {
        let mut table = Table::new(["A", "B"]);
        table.row(["x\u{1b}[2J", ""]);
        assert_eq!(shown(&table), "A            B\nx\\u{1b}[2J\n");
    }

    #[test]
    fn clipping_counts_columns_not_bytes() {
        for (text, columns, expected) in
            [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("日本語", 5, "日本…"), ("日本語", 4, "日…")]
        {
            assert_eq!(clip(text, columns), expected);
        }
    }
}
