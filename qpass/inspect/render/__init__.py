"""Text, HTML, pictures and files of a diff, a report, a recording and noise figures."""
