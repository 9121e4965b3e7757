//! A vector whose places are reused: entries keep their number for as long as they live.

use std::ops::{Index, IndexMut};

/// Entries by number. Using the number of an entry that is gone is a panic.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(crate) fn new() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn insert(&mut self, entry: T) -> u32 {
        if let Some(number) = self.free.pop() {
            self.entries[number as usize] = Some(entry);
            return number;
        }
        self.entries.push(Some(entry));
        (self.entries.len() - 1) as u32
    }

    pub(crate) fn remove(&mut self, number: u32) -> T {
        let entry = self.entries[number as usize].take();
        self.free.push(number);
        entry.expect("an entry is removed once")
    }

    /// None if that entry is gone.
    pub(crate) fn get(&self, number: u32) -> Option<&T> {
        self.entries.get(number as usize).and_then(Option::as_ref)
    }

    /// None if that entry is gone.
    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.entries.get_mut(number as usize).and_then(Option::as_mut)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.entries).filter_map(|(number, entry)| entry.as_ref().map(|entry| (number, entry)))
    }
}

impl<T> Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, number: u32) -> &T {
        self.entries[number as usize].as_ref().expect("entries are used while they live")
    }
}

impl<T> IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        self.entries[number as usize].as_mut().expect("entries are used while they live")
    }
}
