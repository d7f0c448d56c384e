//! Attention-like keys: recurring topics and token types, local drift, a shared offset, rotary positions. Synthetic and simple; the
//! Python benchmarks use a calibrated generator.

/// Deterministic uniform and normal numbers.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    pub(crate) fn normal(&mut self) -> f32 {
        let (u, v) = (self.uniform().max(1e-300), self.uniform());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

pub(crate) struct Data {
    /// `[n, dim]`.
    pub(crate) keys: Vec<f32>,
    /// `[n_queries, group, dim]`.
    pub(crate) queries: Vec<f32>,
}

const LATENT: usize = 48;
const TYPES: usize = 3000;
const TOPICS: usize = 40;

fn rope(x: &mut [f32], position: usize) {
    let half = x.len() / 2;
    for i in 0..half {
        let angle = position as f64 * 5e5_f64.powf(-2.0 * i as f64 / x.len() as f64);
        let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
        let (a, b) = (x[i], x[i + half]);
        x[i] = a * cos - b * sin;
        x[i + half] = b * cos + a * sin;
    }
}

struct Model {
    types: Vec<f32>,
    topics: Vec<f32>,
    mix: Vec<f32>,
    offset: Vec<f32>,
    spectrum: Vec<f32>,
}

impl Model {
    fn new(dim: usize, rng: &mut Rng) -> Self {
        let spectrum: Vec<f32> = (1..=LATENT).map(|i| (i as f32).powf(-0.4)).collect();
        let table = |rows: usize, rng: &mut Rng| -> Vec<f32> {
            (0..rows * LATENT).map(|i| rng.normal() * spectrum[i % LATENT]).collect()
        };
        let (types, topics) = (table(TYPES, rng), table(TOPICS, rng));
        // Content sits in the slowly rotating pairs.
        let weight = |d: usize| 0.12 + 0.88 * ((d % (dim / 2)) as f32 / (dim / 2) as f32).powf(2.4);
        let mix = (0..LATENT * dim).map(|i| rng.normal() * weight(i % dim) / (LATENT as f32).sqrt() * 2.0).collect();
        let mut offset: Vec<f32> = (0..dim).map(|_| rng.normal() * 0.25).collect();
        for d in [dim * 13 / 32, dim * 14 / 32, dim * 29 / 32] {
            offset[d] = 1.8;
        }
        Self { types, topics, mix, offset, spectrum }
    }

    fn project(&self, content: &[f32], offset: f32, noise: f32, rng: &mut Rng) -> Vec<f32> {
        let dim = self.offset.len();
        let mut x: Vec<f32> = self.offset.iter().map(|o| o * offset + noise * rng.normal()).collect();
        for (l, c) in content.iter().enumerate() {
            x.iter_mut().zip(&self.mix[l * dim..][..dim]).for_each(|(x, m)| *x += c * m);
        }
        x
    }
}

/// `n` keys and `n_queries` groups of queries that follow them, each scaled so that the best 256 keys hold 55 to 98 %
/// of its softmax mass.
pub(crate) fn generate(n: usize, n_queries: usize, group: usize, dim: usize, seed: u64) -> Data {
    let mut rng = Rng::new(seed);
    let model = Model::new(dim, &mut rng);
    let (mut topic, mut drift, mut contents) = (0, vec![0.0_f32; LATENT], Vec::with_capacity(n * LATENT));
    let mut keys = Vec::with_capacity(n * dim);
    for position in 0..n {
        if rng.uniform() < 1.0 / 300.0 {
            topic = rng.below(TOPICS);
        }
        // Roughly Zipf: the exponential of a uniform.
        let kind = ((TYPES as f64).powf(rng.uniform()) as usize).min(TYPES - 1);
        let content: Vec<f32> = (0..LATENT)
            .map(|l| {
                drift[l] = 0.95 * drift[l] + 0.31 * rng.normal() * model.spectrum[l];
                0.635 * model.types[kind * LATENT + l]
                    + 0.583 * model.topics[topic * LATENT + l]
                    + 0.28 * drift[l]
                    + 0.4 * rng.normal() * model.spectrum[l]
            })
            .collect();
        let mut key = model.project(&content, 1.0, 0.07, &mut rng);
        rope(&mut key, position);
        keys.extend(key);
        contents.extend(content);
    }
    let mut queries = Vec::new();
    for q in 0..n_queries {
        let mut target = Vec::new();
        for g in 0..group {
            if g == 0 || rng.uniform() > 0.6 {
                let at = rng.below(n);
                let topic = rng.below(TOPICS);
                target = match rng.below(10) {
                    0..6 => contents[at * LATENT..][..LATENT].to_vec(),
                    6..9 => model.topics[topic * LATENT..][..LATENT].iter().map(|x| 1.6 * x).collect(),
                    _ => model.spectrum.iter().map(|s| 0.7 * s * rng.normal()).collect(),
                };
            }
            let content: Vec<f32> =
                target.iter().zip(&model.spectrum).map(|(t, s)| t + 0.35 * s * rng.normal()).collect();
            let mut query = model.project(&content, 0.35, 0.12, &mut rng);
            rope(&mut query, n + q);
            scale(&mut query, &keys, 0.55 + 0.43 * rng.uniform());
            queries.extend(query);
        }
    }
    Data { keys, queries }
}

/// Scales a query so that its 256 best keys hold `target` of the mass of `softmax(q . k / sqrt(dim))`.
fn scale(query: &mut [f32], keys: &[f32], target: f64) {
    let root = (query.len() as f32).sqrt();
    let mut logits: Vec<f32> = keys
        .chunks_exact(query.len())
        .map(|key| key.iter().zip(query.iter()).map(|(k, q)| k * q).sum::<f32>() / root)
        .collect();
    logits.sort_unstable_by(|a, b| b.total_cmp(a));
    let (mut low, mut high) = (1e-2_f32, 1e2_f32);
    for _ in 0..16 {
        let middle = (low * high).sqrt();
        let masses = logits.iter().map(|x| f64::from((middle * (x - logits[0])).exp()));
        let (mut top, mut all) = (0.0, 0.0);
        masses.enumerate().for_each(|(i, mass)| {
            all += mass;
            top += if i < 256 { mass } else { 0.0 };
        });
        if top / all < target { low = middle } else { high = middle }
    }
    for x in query.iter_mut() {
        *x *= low;
    }
}
