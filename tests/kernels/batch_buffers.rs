use mmpo_fast::device::BatchBuffers;
use mmpo_fast::objective::PairConstants;

use crate::harness::*;

device_tests! {
    /// Everything a kernel reads is what the batch says; a second, smaller batch replaces the first.
    fn load(device, bounds) {
        let mut buffers = BatchBuffers::new(device, 64, 8, 64).unwrap();
        for sizes in [RAGGED, &[(2, 3, 1)][..]] {
            let batch = pair_batch(sizes, 5);
            let constants: Vec<PairConstants> = (0..sizes.len())
                .map(|pair| PairConstants { chosen: pair as f32, rejected: 0.5, scale: 0.25, reserved: 0.0 })
                .collect();
            buffers.load(device, &batch, &constants).unwrap();
            assert_eq!(buffers.host_spans, batch.spans);
            let read = |buffer, len: usize| {
                let mut values = vec![0_u32; len];
                device.download(&mut values, buffer, 0).unwrap();
                values
            };
            let tokens = batch.tokens();
            assert_eq!(read(&buffers.token_ids, tokens), batch.token_ids);
            assert_eq!(read(&buffers.positions, tokens), batch.positions);
            assert_eq!(read(&buffers.targets, batch.scored_tokens()), batch.targets);
            assert_eq!(read(&buffers.scored_rows, batch.scored_tokens()), batch.scored_rows);
            assert_eq!(read(&buffers.spans, 4)[1], batch.spans[0].prompt);
            let last = batch.scored.last().unwrap();
            let ends = [last.chosen.start, last.chosen.end, last.rejected.start, last.rejected.end];
            assert_eq!(read(&buffers.scored, sizes.len() * 4)[(sizes.len() - 1) * 4..], ends.map(|end| end as u32));

            let order = read(&buffers.rows_by_token, tokens);
            let keys: Vec<(u32, u32)> =
                order.iter().map(|&row| (batch.token_ids[row as usize], row)).collect();
            assert!(keys.is_sorted() && keys.len() == tokens, "{keys:?}");

            let row_scores = read(&buffers.row_scores, tokens * 2);
            let listed = row_scores.iter().filter(|&&score| score != u32::MAX).count();
            assert_eq!(listed, batch.scored_tokens());
            for (row, scores) in row_scores.chunks(2).enumerate() {
                for &score in scores.iter().filter(|&&score| score != u32::MAX) {
                    assert_eq!(batch.scored_rows[score as usize], row as u32);
                }
            }
        }
    }

    /// A batch beyond any of the three capacities is refused by name and leaves the buffers as they were.
    fn over_capacity(device, bounds) {
        let small = pair_batch(&[(2, 2, 2)], 5);
        let large = pair_batch(&[(4, 3, 3), (1, 1, 1)], 5);
        for (tokens, pairs, scored, what) in
            [(12, 2, 8, "tokens"), (20, 1, 8, "pairs"), (20, 2, 5, "scored tokens")]
        {
            let mut buffers = BatchBuffers::new(device, tokens, pairs, scored).unwrap();
            buffers.load(device, &small, &[]).unwrap();
            let error = buffers.load(device, &large, &[]).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
            assert_eq!(buffers.host_spans, small.spans);
        }
    }

    /// One entry of constants a pair, or none at all.
    fn constants_for_each_pair(device, bounds) {
        let batch = pair_batch(&[(2, 2, 2), (1, 1, 1)], 5);
        let mut buffers = BatchBuffers::new(device, 20, 2, 8).unwrap();
        assert!(buffers.load(device, &batch, &[PairConstants::default()]).is_err());
        buffers.load(device, &batch, &[]).unwrap();
    }
}
