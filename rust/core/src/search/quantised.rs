//! Queries as 16-bit integers, so that the scan of the int8 summaries is exact on every machine.
#![forbid(unsafe_code)]

/// Queries of a group, `level * scale` per element.
#[derive(Debug, Default)]
pub(crate) struct QuantisedQueries {
    /// `[group, 2 * pairs]`, zero-padded to an even length.
    pub(crate) levels: Vec<i16>,
    pub(crate) scales: Vec<f32>,
    /// Norms of the queries as given.
    lengths: Vec<f64>,
    pub(crate) pairs: usize,
}

impl QuantisedQueries {
    /// Quantises `[group, dim]` queries; `map` is applied to each element first.
    pub(crate) fn set(&mut self, queries: &[f32], dim: usize, map: impl Fn(f32) -> f32) {
        self.pairs = dim.div_ceil(2);
        self.levels.clear();
        self.scales.clear();
        self.lengths.clear();
        // Largest level for which a sum of `dim` products with an int8 fits an i32.
        let limit = (i32::MAX as usize / (127 * dim)).min(i16::MAX as usize) as f32;
        for query in queries.chunks_exact(dim) {
            let max = query.iter().fold(0.0_f32, |max, &x| max.max(map(x).abs())).min(f32::MAX);
            let scale = if (max / limit).is_normal() { max / limit } else { 0.0 };
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            // Rounds half away from zero; `round` would be a function call per element.
            let level = |&x: &f32| {
                let level = (map(x) * inverse).clamp(-limit, limit);
                (level + 0.5_f32.copysign(level)) as i16
            };
            self.levels.extend(query.iter().map(level));
            self.levels.resize(self.levels.len() + 2 * self.pairs - dim, 0);
            self.scales.push(scale);
            self.lengths.push(query.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt());
        }
    }

    /// Norm of query `g` times `scaling`, bounded so that no page's reach can overflow (a radius is at most 1e20).
    pub(crate) fn length(&self, g: usize, scaling: f32) -> f32 {
        (self.lengths[g] * f64::from(scaling)).min(1e17) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::QuantisedQueries;

    #[test]
    fn sums_with_int8_means_fit_an_i32_in_every_dim() {
        for dim in [1, 127, 128, 515, 516, 517, 4096, 65536] {
            let mut queries = QuantisedQueries::default();
            queries.set(&vec![3.0; dim], dim, |x| x);
            let largest: i64 = queries.levels.iter().map(|&level| 127 * i64::from(level).abs()).sum();
            assert!(largest <= i64::from(i32::MAX), "dim {dim}: {largest}");
            let back = f32::from(queries.levels[0]) * queries.scales[0];
            assert!((back - 3.0).abs() < 0.01, "dim {dim}: {back}");
        }
    }
}
