//! Tables that are longer than memory should have to be.
//!
//! A table keeps a fixed number of pages at hand and the others in a file without a name, which is made only when the
//! first page has to leave: what is merged every day never touches a disk for it. Reading and writing is by
//! `pread` and `pwrite` and not through a mapping, so that a full disk is an error and not a signal.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt as _;

/// Records of a page.
const RECORDS: usize = 512;
/// Pages at hand.
const KEPT: usize = 64;

/// What a table holds: something of a fixed length, of which zeros are the default.
pub(super) trait Record: Default {
    /// Bytes of each.
    const SIZE: usize;
    fn put(&self, bytes: &mut Fields<'_>);
    fn get(bytes: &mut Taken<'_>) -> Self;
}

/// Writes the fields of a record one after the other.
pub(super) struct Fields<'b>(&'b mut [u8]);

impl Fields<'_> {
    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    fn bytes(&mut self, value: &[u8]) -> &mut Self {
        let (here, rest) = std::mem::take(&mut self.0).split_at_mut(value.len());
        here.copy_from_slice(value);
        self.0 = rest;
        self
    }
}

/// Reads the fields of a record one after the other.
pub(super) struct Taken<'b>(&'b [u8]);

impl Taken<'_> {
    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub(super) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (here, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut bytes = [0; N];
        bytes.copy_from_slice(here);
        bytes
    }
}

struct Page {
    number: u64,
    bytes: Vec<u8>,
    changed: bool,
    /// Since the hand came by.
    used: bool,
}

/// Records by index. What was never written is the default.
pub(super) struct Table<'s, R> {
    scratch: &'s dyn Fn() -> io::Result<File>,
    file: Option<File>,
    pages: Vec<Page>,
    places: HashMap<u64, usize>,
    /// The page of the last access, which is mostly that of the next.
    last: usize,
    /// Of the clock that chooses which page leaves.
    hand: usize,
    len: u64,
    record: PhantomData<R>,
}

impl<'s, R: Record> Table<'s, R> {
    /// An empty table, whose file will come from `scratch`.
    pub(super) fn new(scratch: &'s dyn Fn() -> io::Result<File>) -> Self {
        Self {
            scratch,
            file: None,
            pages: Vec::new(),
            places: HashMap::new(),
            last: 0,
            hand: 0,
            len: 0,
            record: PhantomData,
        }
    }

    /// One more than the greatest index that was written.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn push(&mut self, record: &R) -> io::Result<()> {
        self.set(self.len, record)
    }

    pub(super) fn get(&mut self, index: u64) -> io::Result<R> {
        if index >= self.len {
            return Ok(R::default());
        }
        let at = (index % RECORDS as u64) as usize * R::SIZE;
        let page = self.page(index / RECORDS as u64)?;
        Ok(R::get(&mut Taken(&page.bytes[at..at + R::SIZE])))
    }

    pub(super) fn set(&mut self, index: u64, record: &R) -> io::Result<()> {
        let at = (index % RECORDS as u64) as usize * R::SIZE;
        let page = self.page(index / RECORDS as u64)?;
        record.put(&mut Fields(&mut page.bytes[at..at + R::SIZE]));
        page.changed = true;
        self.len = self.len.max(index + 1);
        Ok(())
    }

    fn page(&mut self, number: u64) -> io::Result<&mut Page> {
        if self.pages.get(self.last).is_none_or(|page| page.number != number) {
            self.last = match self.places.get(&number) {
                Some(place) => *place,
                None => self.load(number)?,
            };
        }
        let page = &mut self.pages[self.last];
        page.used = true;
        Ok(page)
    }

    /// Brings a page in. Returns its place.
    fn load(&mut self, number: u64) -> io::Result<usize> {
        let place = if self.pages.len() < KEPT {
            let bytes = vec![0; RECORDS * R::SIZE];
            self.pages.push(Page { number, bytes, changed: false, used: true });
            self.pages.len() - 1
        } else {
            let place = self.make_room()?;
            self.pages[place].bytes.fill(0);
            self.pages[place].number = number;
            place
        };
        if let Some(file) = &self.file {
            fill(file, &mut self.pages[place].bytes, number)?;
        }
        self.places.insert(number, place);
        Ok(place)
    }

    fn make_room(&mut self) -> io::Result<usize> {
        while std::mem::take(&mut self.pages[self.hand].used) {
            self.hand = (self.hand + 1) % self.pages.len();
        }
        let place = self.hand;
        let page = &mut self.pages[place];
        if page.changed {
            let file = match &self.file {
                Some(file) => file,
                None => self.file.insert((self.scratch)()?),
            };
            file.write_all_at(&page.bytes, page.number * page.bytes.len() as u64)?;
            page.changed = false;
        }
        self.places.remove(&page.number);
        Ok(place)
    }
}

/// Reads a page; zeros where the file has none.
fn fill(file: &File, page: &mut [u8], number: u64) -> io::Result<()> {
    let start = number * page.len() as u64;
    let mut filled = 0;
    while filled < page.len() {
        match file.read_at(&mut page[filled..], start + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Pair(u64, u32);

    impl Record for Pair {
        const SIZE: usize = 12;
        fn put(&self, bytes: &mut Fields<'_>) {
            bytes.u64(self.0).u32(self.1);
        }
        fn get(bytes: &mut Taken<'_>) -> Self {
            Self(bytes.u64(), bytes.u32())
        }
    }

    #[test]
    fn a_table_remembers_more_than_it_has_at_hand() {
        let files = std::cell::Cell::new(0);
        let scratch = || {
            files.set(files.get() + 1);
            tempfile::tempfile()
        };
        let mut table = Table::new(&scratch);
        let few = (RECORDS * KEPT) as u64;
        for index in 0..few {
            table.push(&Pair(index, 7)).unwrap();
        }
        assert_eq!(files.get(), 0, "what fits needs no file");
        let many = 3 * few;
        for index in few..many {
            table.push(&Pair(index, 7)).unwrap();
        }
        // In steps that leave no page alone, there and back.
        for index in (0..many).step_by(1009).chain((0..many).rev().step_by(997)) {
            let mut pair = table.get(index).unwrap();
            assert_eq!(pair.0, index);
            pair.1 += 1;
            table.set(index, &pair).unwrap();
        }
        let visits: u64 = (0..many).map(|index| u64::from(table.get(index).unwrap().1) - 7).sum();
        assert_eq!(visits, many.div_ceil(1009) + many.div_ceil(997));
        assert_eq!((files.get(), table.len()), (1, many));
        table.set(many + 5 * few, &Pair(1, 1)).unwrap();
        assert_eq!(table.get(many + 3 * few).unwrap(), Pair::default());
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let scratch = || Err(io::Error::from(io::ErrorKind::StorageFull));
        let mut table = Table::new(&scratch);
        let pushed = (0..=(RECORDS * KEPT) as u64).map(|index| table.push(&Pair(index, 0)));
        let errors: Vec<_> = pushed.filter_map(Result::err).map(|error| error.kind()).collect();
        assert_eq!(errors, [io::ErrorKind::StorageFull]);
    }
}
