"""The faces of a diff, a report, a recording and noise figures: text, HTML, pictures, other programs."""
