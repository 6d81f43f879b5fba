"""What judges are asked, and how their replies are read: rubrics, schedules, preference functions."""
