//! An index from a file.
#![forbid(unsafe_code)]

use rayon::ThreadPool;

use super::batch::Batch;
use super::error::{Result, VectorError};
use super::format;
use super::index::VectorIndex;
use super::metric::check_stored_rows;
use super::progress::Progress;
use super::state::State;
use super::write::append_ordered;

impl VectorIndex {
    /// The index of a file; its pages are packed again, in the order of the file.
    ///
    /// # Errors
    /// If the bytes are not a complete, unchanged file of this version.
    pub fn from_bytes(pool: &ThreadPool, file: &[u8]) -> Result<Self> {
        let content = format::from_bytes(file)?;
        let config = content.config;
        let mut rows = vec![0.0; content.ids.len() * config.dim];
        crate::rows::decode(config.dtype, &content.keys, &mut rows);
        for values in [&rows, &content.mean] {
            check_stored_rows("file", values, config.dim).map_err(|error| VectorError::format(error.to_string()))?;
        }
        let forest = config.new_forest()?;
        let mut state = State {
            mean: content.mean.into(),
            centred: content.centred,
            next_id: content.next_id,
            ..State::empty(config, &forest)
        };
        let batch = Batch { ids: content.ids, rows, norms: content.norms };
        let order: Vec<usize> = (0..batch.len()).collect();
        append_ordered(config, pool, &forest, &mut state, &batch, &order, &mut Progress::new(None, 0))?;
        state.enter_ids(0);
        Ok(Self::from_parts(config, Some(forest), state))
    }
}
