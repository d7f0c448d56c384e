//! A hash of the whole structure: layout, rows, summaries, codes. Page ids are left out, because they depend on history.
#![forbid(unsafe_code)]

use xxhash_rust::xxh3::Xxh3;

use crate::codes::KeyCodes;
use crate::forest::Forest;
use crate::snapshot::View;

impl Forest {
    /// Equal for two forests with the same tokens in the same pages and slots with the same summaries, whatever
    /// built them.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        let views: Vec<View> = self.views().collect();
        hash.update(&views.first().map_or(0, View::tokens).to_le_bytes());
        for view in &views {
            add_tree(&mut hash, view);
        }
        hash.digest()
    }
}

fn add_tree(hash: &mut Xxh3, view: &View) {
    hash.update(&view.tokens().to_le_bytes());
    for (ordinal, page) in view.ordered_pages() {
        hash.update(&ordinal.to_le_bytes());
        hash.update(&page.live.to_le_bytes());
        for slot in page.slots() {
            let row = page.row(slot);
            hash.update(&page.position(slot).to_le_bytes());
            hash.update(row.key);
            hash.update(row.value);
        }
    }
    for entry in view.snapshot().segments.all() {
        let summaries = &entry.segment.summaries;
        (0..summaries.n_blocks()).for_each(|b| hash.update(bytemuck::cast_slice(summaries.block(b))));
        hash.update(bytemuck::cast_slice(&summaries.scales));
        hash.update(bytemuck::cast_slice(&summaries.spreads));
        hash.update(bytemuck::cast_slice(&summaries.radii));
        entry.segment.codes.iter().flat_map(KeyCodes::bytes).for_each(|bytes| hash.update(bytes));
    }
}
