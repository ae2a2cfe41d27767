//! Row groups whose pages are held against their bytes before the crate reads them.
//!
//! The crate makes room for as many values as a page claims, and looks only then whether the page holds them: a file
//! of ten kilobytes could take all memory. Here each header is checked before the page's bytes are decompressed, and
//! each page before its values are decoded.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, Encoding, Type as PhysicalType};
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{ChunkReader, Length, RowGroupReader, SerializedPageReader};
use parquet::record::reader::RowIter;
use parquet::schema::types::{ColumnDescPtr, Type};

use super::claims::{self, Lists};

/// A row group of the file, with checked pages.
pub(super) struct CheckedRowGroup<'a> {
    pub file: Arc<File>,
    pub metadata: &'a RowGroupMetaData,
}

impl RowGroupReader for CheckedRowGroup<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.metadata
    }

    fn num_columns(&self) -> usize {
        self.metadata.num_columns()
    }

    fn get_column_page_reader(&self, index: usize) -> Result<Box<dyn PageReader>> {
        let chunk = self.metadata.column(index);
        let column = chunk.column_descr_ptr();
        let file = CheckedFile { file: self.file.clone(), codec: chunk.compression() };
        let rows = usize::try_from(self.metadata.num_rows())?;
        let pages = SerializedPageReader::new(Arc::new(file), chunk, rows, None)?;
        let lists = Lists::new(column.max_rep_level());
        Ok(Box::new(CheckedPages { pages, column, lists }))
    }

    fn get_column_bloom_filter(&self, _: usize) -> Option<&Sbbf> {
        None
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

/// The file as a source of pages: the crate reads a page's header from a reader, and its bytes after that.
struct CheckedFile {
    file: Arc<File>,
    codec: Compression,
}

impl Length for CheckedFile {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for CheckedFile {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        let mut reader = self.file.get_read(start)?;
        match claims::page(reader.fill_buf()?, self.codec) {
            None => Ok(reader),
            Some(fault) => Err(ParquetError::General(fault)),
        }
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.file.get_bytes(start, length)
    }
}

/// The pages of a column chunk.
struct CheckedPages {
    pages: SerializedPageReader<CheckedFile>,
    column: ColumnDescPtr,
    lists: Lists,
}

impl CheckedPages {
    fn checked(&mut self, page: Page) -> Result<Page> {
        match self.fault(&page) {
            None => Ok(page),
            Some(fault) => Err(ParquetError::General(format!("column `{}`: {fault}", self.column.path()))),
        }
    }

    /// What is wrong with the claims of a page.
    fn fault(&mut self, page: &Page) -> Option<String> {
        let bytes: &[u8] = page.buffer();
        let (repetitions, values) = match page {
            Page::DictionaryPage { num_values, .. } => {
                return claims::dictionary(*num_values, bytes, self.bits_of_value());
            }
            Page::DataPage { num_values, rep_level_encoding, def_level_encoding, .. } => {
                let (count, column) = (*num_values, &self.column);
                let (repetitions, rest) =
                    claims::levels(bytes, count, *rep_level_encoding, column.max_rep_level())?;
                let (_, values) = claims::levels(rest, count, *def_level_encoding, column.max_def_level())?;
                (repetitions, values)
            }
            Page::DataPageV2 { def_levels_byte_len, rep_levels_byte_len, .. } => {
                let (repetitions, rest) = bytes.split_at_checked(*rep_levels_byte_len as usize)?;
                let (_, values) = rest.split_at_checked(*def_levels_byte_len as usize)?;
                (Some(repetitions), values)
            }
        };
        let lists = repetitions.and_then(|levels| self.lists.add(levels, page.num_values()));
        lists.or_else(|| self.fault_of_lengths(page, values))
    }

    /// What is wrong with the lengths of texts that are stored as differences, which the crate reads all at once.
    fn fault_of_lengths(&self, page: &Page, values: &[u8]) -> Option<String> {
        let streams = match page.encoding() {
            Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
            Encoding::DELTA_BYTE_ARRAY => 2,
            _ => return None,
        };
        let mut rest = values;
        for _ in 0..streams {
            match claims::lengths(rest, page.num_values()) {
                Ok(after) => rest = after,
                Err(fault) => return Some(fault),
            }
        }
        None
    }

    /// Bits that a value of a dictionary takes at least.
    fn bits_of_value(&self) -> u64 {
        match self.column.physical_type() {
            PhysicalType::BOOLEAN => 1,
            PhysicalType::INT32 | PhysicalType::FLOAT => 32,
            PhysicalType::INT64 | PhysicalType::DOUBLE => 64,
            PhysicalType::INT96 => 96,
            // The length in front of a text.
            PhysicalType::BYTE_ARRAY => 32,
            PhysicalType::FIXED_LEN_BYTE_ARRAY => {
                8 * u64::try_from(self.column.type_length()).unwrap_or(0).max(1)
            }
        }
    }
}

impl Iterator for CheckedPages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        page.map(|page| self.checked(page)).transpose()
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }

    fn supports_deferred_dictionary(&self) -> bool {
        self.pages.supports_deferred_dictionary()
    }

    fn take_deferred_dictionary(&mut self) -> Result<Option<Page>> {
        let page = self.pages.take_deferred_dictionary()?;
        page.map(|page| self.checked(page)).transpose()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}
