//! Names inside one tree.
#![forbid(unsafe_code)]

/// A token of one tree: tokens are numbered in the order they came, and a removed number is not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u32);

/// A point above the finest level, seen as the parent of its children; or the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct CellId(pub(super) u32);

/// A leaf: up to 16 children of one cell in one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LeafId(pub(super) u32);

/// Things of one kind under numbers that are used again after a removal.
#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }

    pub(super) fn add(&mut self, item: T) -> u32 {
        if let Some(id) = self.free.pop() {
            self.items[id as usize] = Some(item);
            return id;
        }
        self.items.push(Some(item));
        (self.items.len() - 1) as u32
    }

    pub(super) fn take(&mut self, id: u32) -> Option<T> {
        let item = self.items[id as usize].take();
        self.free.extend(item.is_some().then_some(id));
        item
    }

    #[expect(clippy::expect_used, reason = "ids are handed out by `add`; a dangling one is a bug")]
    pub(super) fn get(&self, id: u32) -> &T {
        self.items[id as usize].as_ref().expect("the id names a live item")
    }

    #[expect(clippy::expect_used, reason = "ids are handed out by `add`; a dangling one is a bug")]
    pub(super) fn get_mut(&mut self, id: u32) -> &mut T {
        self.items[id as usize].as_mut().expect("the id names a live item")
    }

    /// Live items with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(id, item)| Some((id as u32, item.as_ref()?)))
    }

    pub(super) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }

    /// One past the largest number in use.
    pub(super) fn end(&self) -> usize {
        self.items.len()
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.items.capacity() * size_of::<Option<T>>() + self.free.capacity() * 4
    }
}
